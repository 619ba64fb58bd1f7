"""Public ops of hsrgan."""
