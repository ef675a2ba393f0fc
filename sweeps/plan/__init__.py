"""WHAT IS LEFT: measurements that are neither stored nor in flight, packed by model, with predicted cost."""
