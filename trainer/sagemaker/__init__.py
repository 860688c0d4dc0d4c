"""Inside of a SageMaker training job: what it says, where it wants things, and how its processes are started."""
