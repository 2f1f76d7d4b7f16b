"""Configuration: functions that configs call, and explanations of a wrong one."""
