"""The teacher's logits on disk: written by the first run, read by later ones in the teacher's place."""
