"""Built-in metrics for machines without sacrebleu, rouge-score or bert-score.

Every module here has the same three functions:
`statistics(hypotheses, reference_sets)` gives one row of sufficient statistics a sentence, float64 [sentences, K];
`value(sums)` turns sums of such rows, [..., K], into corpus scores, [...], so that a bootstrap never reads text again;
`signature(references)` names the exact variant. `reference_sets` holds lists of the same length as `hypotheses`.

The bootstrap uses the statistics of BLEU, chrF and TER also where sacrebleu is installed: they agree with it exactly.
"""
