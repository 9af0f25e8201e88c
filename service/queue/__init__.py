"""The verbs and the loop: submit, retract, plan, claim, hand over, record what comes back, explain what waits."""
