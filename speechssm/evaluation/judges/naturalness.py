"""How natural does it sound? Mean opinion scores predicted without a reference, 1 to 5.

DistillMOS (Stahl and Gamper 2025, "Distillation and Pruning for Scalable Self-Supervised
Representation-Based Speech Quality Assessment", arXiv:2502.05356) is a small network distilled from
wav2vec-XLS-R judges; DNSMOS (Reddy et al. 2022, arXiv:2110.01763, P.835; 2021, arXiv:2010.15258,
P.808) was made for noise suppression and hears noise better than artefacts of codecs.
"""

import contextlib
import io
from pathlib import Path

import numpy as np
import torch

from speechssm.evaluation.judges import at_judge_rate, equal_spans, load_package

# Both networks hear one window of a fixed length (7.68 s; 9.01 s) and were trained on clips of
# about ten seconds.
CLIP_SECONDS = 10.0


class DistillMOS:
    """Overall quality.

    A clip of up to 10 s is scored as the package does: padded with silence to 7.68 s, or the mean
    over windows of that length at most 1 s apart. Longer audio is cut into equal spans of at most
    10 s, whose scores are averaged. Loudness does not matter: windows are scaled to their peak.
    """

    command = "pip install distillmos==0.9.1"

    def __init__(self) -> None:
        package = load_package("distillmos", "DistillMOS", self.command)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints where its weights are
            self._network = package.ConvTransformerSQAModel().eval()

    @torch.inference_mode()
    def score(self, audio: np.ndarray, rate: int) -> dict[str, float]:
        """{"distillmos": 1 ... 5} of audio [S] at `rate` Hz."""
        audio_S = torch.from_numpy(at_judge_rate(audio, rate))
        spans = equal_spans(len(audio_S), 16_000, CLIP_SECONDS)
        scores = [self._network(audio_S[None, span]).item() for span in spans]
        return {"distillmos": float(np.mean(scores))}


class DNSMOS:
    """Overall, signal and background quality (P.835) and overall quality (P.808).

    A clip is scored as the package does: one shorter than 9.01 s is repeated until it is long
    enough; of one of up to 10 s the first 9.01 s count. Longer audio is cut into equal spans of at
    most 10 s, whose scores are averaged.
    """

    command = "pip install speechmos==0.0.1.1 librosa onnxruntime requests"

    def __init__(self) -> None:
        package = load_package("speechmos.dnsmos", "DNSMOS", self.command)
        load_package("librosa.feature", "DNSMOS", self.command)  # librosa loads its parts late
        models = Path(package.__file__).parent / "dnsmos_models"
        paths = str(models / "sig_bak_ovr.onnx"), str(models / "model_v8.onnx")
        self._network = package.DNSMOS(*paths)
        # The package's own sessions take every core, and spin while they wait.
        runtime = package.ort
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._network.onnx_sess, self._network.p808_onnx_sess = (
            runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for path in paths
        )

    def score(self, audio: np.ndarray, rate: int) -> dict[str, float]:
        """{"dnsmos_overall", "dnsmos_signal", "dnsmos_background", "dnsmos_p808"}, each 1 ... 5."""
        audio_S = at_judge_rate(audio, rate)
        found = [
            self._network(audio_S[span].astype(np.float64), 16_000, False)
            for span in equal_spans(len(audio_S), 16_000, CLIP_SECONDS)
        ]
        names = {"overall": "ovrl", "signal": "sig", "background": "bak", "p808": "p808"}
        return {
            f"dnsmos_{name}": float(np.mean([scores[f"{key}_mos"] for scores in found]))
            for name, key in names.items()
        }
