"""Do the demo's results hold? `python experiments/demo/check.py runs/demo/metrics.json`

Prints one line for each claim and exits with 1 when one does not hold. The claims: every stage, and
each shipped model, beats its trivial baseline on held-out recordings, the units have not
collapsed, and memory does not grow with what is generated.
"""

import json
import sys
from pathlib import Path

# How many comparisons each stage has at least; none may be missing, none may fail.
EXPECTED = {"tokenizer": 7, "soundstream": 4, "soundstorm": 16, "lm": 3, "pipeline": 2}
SMALLEST_PERPLEXITY = 64
SMALLEST_GAIN = 0.1  # nats per unit better than the unigram


def claims(results: dict) -> list[tuple[str, bool]]:
    """The claims about a demo's `metrics.json`, as (sentence, whether it holds)."""
    comparisons = results["comparisons"]
    lines = [
        (
            f"{entry['stage']}: {entry['name']} of {entry['system']} {entry['ours']:.4g} against "
            f"{entry['baseline_name']} {entry['baseline']:.4g} {entry['unit']}",
            bool(entry["holds"]),
        )
        for entry in comparisons
    ]
    for stage, expected in EXPECTED.items():
        count = sum(entry["stage"] == stage for entry in comparisons)
        lines.append(
            (f"{stage}: {count} of at least {expected} comparisons made", count >= expected)
        )
    perplexity = [row["value"] for row in results["rows"] if row["name"] == "unit_perplexity"]
    lines.append(
        (
            f"tokenizer: unit perplexity {min(perplexity, default=0):.0f}, at least "
            f"{SMALLEST_PERPLEXITY}",
            min(perplexity, default=0) >= SMALLEST_PERPLEXITY,
        )
    )
    gains = [entry["margin"] for entry in comparisons if entry["stage"] == "lm"]
    lines.append(
        (
            f"lm: every model at least {SMALLEST_GAIN} nats per unit better than the unigram "
            f"(smallest gain {min(gains, default=0):.2f})",
            min(gains, default=0) >= SMALLEST_GAIN,
        )
    )
    return lines


def main() -> int:
    """Check the file named on the command line."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    lines = claims(json.loads(Path(sys.argv[1]).read_text()))
    for text, holds in lines:
        print("holds " if holds else "FAILS ", text)
    failed = sum(not holds for _, holds in lines)
    print(f"{len(lines) - failed} of {len(lines)} claims hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
