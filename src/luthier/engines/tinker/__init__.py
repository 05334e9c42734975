"""The `tinker` engine: training on any service that speaks Tinker's protocol, through the SDK as it is published."""
