"""Pictures and pages: figures, previews, the self-contained report, and the hand-back of a run."""
