"""Hyperparameter search: trials that are training runs, proposed and pruned by Optuna, in a study that survives whoever runs it."""
