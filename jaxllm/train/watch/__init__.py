"""What watches over a run and tells of it: metrics, events, spikes, replicas, hangs, signals."""
