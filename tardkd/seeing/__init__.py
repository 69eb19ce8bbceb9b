"""Pictures: curves of runs, detections, and what a teacher taught where and why."""
