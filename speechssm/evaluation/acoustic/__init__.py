"""SoundStorm measured: the codes it predicts, and the speech it makes over minutes."""
