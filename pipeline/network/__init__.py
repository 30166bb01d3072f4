"""The CNN: its layers, its training, its scores and its explanations. Imports torch and numpy only."""
