"""Parallel corpora, tokenizers, the tokenised cache, batches, and the embedded phrasebook.

Import from the modules: `cvmk.text.corpus`, `.tokenizers`, `.cache`, `.batching` (the only one that needs torch),
`.phrasebook`, `.languages`.
"""
