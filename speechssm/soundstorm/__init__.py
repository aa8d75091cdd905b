"""SoundStorm: codes of a voice from units, all frames at once, level after level."""
