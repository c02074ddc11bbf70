"""From noise to pictures: the schedule, the solvers, guidance and decoding. It never imports `train`."""
