"""Classification losses, one method per file; `mmdet_lt.models` imports them all."""
