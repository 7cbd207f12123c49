"""Image classifiers whose features the distillation and the scores are made of."""
