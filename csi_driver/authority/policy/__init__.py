"""The policy in force and the facts about a pod that policy rules refer to. csi_driver.core.policy makes the decisions."""
