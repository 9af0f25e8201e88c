"""The API as a process, and the supervisor that keeps API, dispatcher and Ray head running."""
