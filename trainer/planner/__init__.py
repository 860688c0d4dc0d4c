"""What a job will take and cost before it runs: memory, time and money, for each way to spread it."""
