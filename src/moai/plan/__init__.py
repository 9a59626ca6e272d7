"""Floor 2: StepGraph + Cluster -> Plan. Knows nothing of scripts and workers."""
