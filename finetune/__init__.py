"""Training: recipes, data, what trains, the loop, comparisons. Modules are imported where they are used.

`orthoact.train(recipe, folder)` and `orthoact finetune RECIPE` write an ordinary converted checkpoint, which loads as
every other one does, and beside it:

- `orthoact.json`: as of a conversion (`base`, `sites`, `left`, `parameters`, `fits`), and `training`:
  `recipe` (all its keys), `what`, `trainable` (the number of trainable parameters) and `trainable_by` (by kind),
  `path` (of the activations: one of `engine.PATHS`), `processes`, `train` (examples),
  `step` (steps done), `loss` (of the last logged step), `zero_step`, `validation`,
  `best` and `test` (figures: `loss` and `perplexity`, or `loss`, `accuracy` and `f1`; `best` has its `step`),
  `seconds` (in the loop), `total_seconds`, `peak_memory` (bytes), `finished`. While a run is going on, `training` holds
  `recipe` and `finished: false` alone.
- `metrics.jsonl`: one object a logged step: `step`, `loss` (mean since the line before), `learning_rate`, `seconds`,
  `validation_*` where the validation split was measured, `sites` (name of a site -> `outside`, `least`, `greatest`).
- `state/`: checkpoints of the run, see `state`; not part of the model, never pushed.

`orthoact finetune RECIPE --compare` writes a folder of its own with

- `comparison.json`: `recipe`; `cells`, one a row, rate and seed, with `row`, `learning_rate`, `seed`, `trainable`,
  `trainable_by`, `step`, `zero_step`, `validation`, `test`, `seconds`, `peak_memory`, or `diverged` (why); `rows`, one
  a row, with `row`, `learning_rate` (the chosen one), `seeds`, `diverged` (how many), `rates` (rate -> validation
  figures of each seed), `trainable`, `seconds` (mean), `peak_memory` (largest), and for each of `zero_step`,
  `validation` and `test` the `mean` and `std` of each figure; those of the row's `metric` also plainly, as `test_mean`,
  `test_std`, and so on.
- `comparison.md`: the table; `comparison.png`: the test metric against the number of trainable parameters.
"""
