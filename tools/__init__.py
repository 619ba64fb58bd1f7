"""Command-line tools of hsrgan."""
