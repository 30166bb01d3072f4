"""The CNN: its layers, its training, its scores and its explanations. Knows no file, no data set and no MLflow."""
