#!/usr/bin/env node
// Makes a restored OpenClaw state startable on this host.
//
// The gateway holds leases in its main database, renewed every 30 seconds and valid for 300. They name the
// host and process that wrote them, so a copy restored on another host looks owned by a gateway that is still
// alive, and the new one refuses to start. Upstream drops the same two tables' rows from its own backups.
// Agents' databases hold no leases (their last use of such a table was retired upstream), so they are left alone.
//
// The supervisor runs this as the gateway's user and with the gateway's environment, after a restore and before
// the first start, while no gateway runs. Nothing to clear is success.
import { statSync } from "node:fs";
import { homedir } from "node:os";
import { join, resolve } from "node:path";
import { DatabaseSync } from "node:sqlite";

const LEASE_TABLES = ["state_leases", "agent_database_leases"];

/** As the gateway resolves it: OPENCLAW_STATE_DIR, else `.openclaw` in OPENCLAW_HOME or HOME; `~` is the home. */
function stateDirectory(env) {
  const expand = (path, home) => resolve(path.replace(/^~(?=$|\/)/, () => home));
  const osHome = env.HOME || homedir();
  const home = expand(env.OPENCLAW_HOME?.trim() || osHome, osHome);
  const override = env.OPENCLAW_STATE_DIR?.trim();
  return override ? expand(override, home) : join(home, ".openclaw");
}

function clearLeases(file) {
  // A killed predecessor may still be letting go of the file.
  const database = new DatabaseSync(file, { timeout: 5000 });
  try {
    const exists = database.prepare("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?");
    for (const table of LEASE_TABLES) {
      if (exists.get(table)) database.exec(`DELETE FROM ${table}`);
    }
  } finally {
    database.close();
  }
}

const file = join(stateDirectory(process.env), "state", "openclaw.sqlite");
try {
  if (statSync(file, { throwIfNoEntry: false })) clearLeases(file);
} catch (error) {
  console.error(`prepare: cannot clear the old host's leases in ${file}: ${error.message}`);
  process.exitCode = 1;
}
