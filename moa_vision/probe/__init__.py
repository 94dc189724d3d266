"""What a frozen or fine-tuned encoder is worth: nearest neighbours, linear probe, fine-tuning."""
