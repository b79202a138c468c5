"""Where ranks run: this machine, hosts, Slurm; their start, end and proof of resume."""
