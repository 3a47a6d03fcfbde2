"""What `redvtp doctor` looks at: the installation, the machine, a checkpoint, and the memory that serving it takes."""
