"""The verbs and the loop: submit, retract, plan, claim, hand over, record outcomes, explain why a job waits."""
