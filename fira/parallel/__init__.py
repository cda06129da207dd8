"""Distribution of a model and its batch over ranks: stages, replicas, and experts."""
