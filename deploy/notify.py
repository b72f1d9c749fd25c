#!/usr/bin/env python3
"""Has Prefect tell a webhook (Slack's, Mattermost's, one of your own) of every run that failed or crashed.

VITPRUNE_WEBHOOK is the webhook's address, which Prefect's database keeps encrypted; PREFECT_API_URL is the server's.
Run again, it takes the newer address. `deploy/servers up` runs it wherever VITPRUNE_WEBHOOK is set.
"""

import os
import sys

from prefect.automations import Automation
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.events.actions import CallWebhook
from prefect.events.schemas.automations import EventTrigger, Posture

BLOCK = "vitprune-webhook"
NAME = "vitprune: tell of runs that failed or crashed"
SAID = 'flow.name ~ " " ~ flow_run.name ~ " is " ~ flow_run.state.name ~ ": " ~ flow_run.state.message'


def main() -> None:
    """Keep the address and make the automation, unless it is there."""
    address = os.environ.get("VITPRUNE_WEBHOOK", "")
    if not address.startswith(("http://", "https://")) or not os.environ.get("PREFECT_API_URL"):
        sys.exit("Error: set VITPRUNE_WEBHOOK to the webhook's address and PREFECT_API_URL to the server's")
    webhook = Webhook(url=address, headers={"Content-Type": "application/json"})
    block = webhook.save(BLOCK, overwrite=True)
    with get_client(sync_client=True) as client:
        if client.read_automations_by_name(NAME):
            return
    Automation(
        name=NAME,
        trigger=EventTrigger(
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[CallWebhook(block_document_id=block, payload=f'{{"text": {{{{ ({SAID}) | tojson }}}}}}')],
    ).create()


if __name__ == "__main__":
    main()
