"""Training engine of hsrgan."""
