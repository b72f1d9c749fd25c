"""Change the model registry of a project as `retrain` does, and print it: registry_worker.py PROJECT ACTION...

Actions: add:FLOW, promote:VERSION, delete:VERSION, forget (the registered model), back.
"""

import json
import sys
from pathlib import Path

from vitprune.orchestration.tracking.registry import registry
from vitprune.orchestration.tracking.registry_copy import keep_copy
from vitprune.orchestration.tracking.upload import KEY


def main() -> None:
    project = Path(sys.argv[1])
    models = registry(project)
    client = models.client
    for word in sys.argv[2:]:
        action, _, name = word.partition(":")
        if action == "add":
            (run,) = client.search_runs([models.experiment], f"tags.`{KEY}` = '{name}'")
            models.add(run.info.run_id, name, {"vitprune.data_version": f"data of {name}", "vitprune.passed": "true"})
        elif action == "promote":
            models.promote(client.get_model_version(models.name, name))
        elif action == "delete":
            client.delete_model_version(models.name, name)
        elif action == "forget":
            client.delete_registered_model(models.name)
        else:
            models.roll_back()
        keep_copy(project, models)
    champion = models.champion()
    versions = {}
    for version in models.versions():
        model_id = version.source.removeprefix("models:/")
        run, model = client.get_run(version.run_id), client.get_logged_model(model_id)
        keys = [run.data.tags[KEY], model.tags[KEY], str(model.status)]
        versions[str(version.version)] = [version.tags, *keys, len(client.list_logged_model_artifacts(model.model_id))]
    print(json.dumps({"champion": champion and str(champion.version), "versions": versions}))


if __name__ == "__main__":
    main()
