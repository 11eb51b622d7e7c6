"""One file per question; configs/ has the presets of the launcher."""
