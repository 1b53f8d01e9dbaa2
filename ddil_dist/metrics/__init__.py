"""What is measured of a policy's images, and the record that says how it was measured.

Images come in as float [N, 3, H, W] in [0, 1]; numbers come out. `features` makes feature vectors, `fid`, `diversity`,
`clip_score`, `agreement` and `trajectory` are the metrics, `evaluate` runs them all on one policy's images, `protocol`
and `results` keep the numbers with what one needs to repeat them, `table` shows them. Nothing here samples images.

Importing the package imports no torch: `protocol`, `results` and `table` are for reports and terminals.
"""
