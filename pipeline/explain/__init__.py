"""What the trained model learned and where it fails: arrays, figures, a report and a model card."""
