"""The demo, ``python -m curvopt.demo``: AdamW and GritKFAC side by side on text that every Python has."""
