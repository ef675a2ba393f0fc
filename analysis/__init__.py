"""Turn a table of results into tables, scaling curves, comparisons, figures and findings.

Pure functions of a DataFrame (``sweeps.load_results``). Nothing here imports torch; matplotlib, scipy and rich are
imported when used.

    cells         which rows count, and the plain block-wise cells every comparison starts from
    metrics       which metric columns there are, their names, units and direction
    replicates    cells that differ in nothing but their calibration data's seed
    mixtures      warnings about tables that mix datasets, revisions, limits or compute dtypes
    tables/       a metric by bits and data type; results as CSV, parquet, Markdown or LaTeX
    scaling/      bit-level scaling: which precision is best for a number of model bits
    significance/ two measurements on the same samples: their difference with a confidence interval
    figures/      loss against total bits by precision; data types; block sizes; methods
    beside/       each quantization beside the best plain rounding of at most as many bits
    findings/     what the data say about the paper's questions
"""
