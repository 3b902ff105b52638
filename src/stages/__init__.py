"""What is learned: each stage turns a batch into losses, and never steps an optimizer."""
