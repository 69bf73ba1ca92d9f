// Writers and a check for snapshots of one instant (ledger.rs). Money moves from one SQLite database (WAL mode) to another one
// (rollback mode), then its count goes to a file that is replaced by rename, then to a log that is appended to, and only
// then the next move begins. So at any instant the four counts are n, or the first ones are n and the others n - 1.
//
// `databases DIR UID` and `files DIR UID` are two processes that talk over their standard input and output, at full speed.
// `check DIR…` prints a JSON line for each restored directory.
const fs = require("node:fs");
const { DatabaseSync } = require("node:sqlite");

const MONEY = 1_000_000_000;
const [mode, folder, uid, ...others] = process.argv.slice(2);
const at = (directory, name) => `${directory}/${name}`;

/** Reads one line; false when the other side is gone. */
function hear() {
  const byte = Buffer.alloc(1);
  try {
    while (fs.readSync(0, byte) === 1) if (byte[0] === 10) return true;
  } catch {}
  return false;
}

function account(name, journal, money) {
  const database = new DatabaseSync(at(folder, name));
  database.exec(`PRAGMA journal_mode = ${journal}; PRAGMA synchronous = OFF; PRAGMA wal_autocheckpoint = 50;
    CREATE TABLE account (money INTEGER, moves INTEGER); INSERT INTO account VALUES (${money}, 0);
    CREATE TABLE history (move INTEGER PRIMARY KEY, note TEXT)`);
  const move = database.prepare("UPDATE account SET money = money + ?, moves = ?");
  const note = database.prepare("INSERT INTO history VALUES (?, ?)");
  const forget = database.prepare("DELETE FROM history WHERE move <= ?");
  return (by, count) => {
    database.exec("BEGIN");
    move.run(by, count);
    note.run(count, String(count).repeat(50));
    forget.run(count - 300);
    database.exec("COMMIT");
  };
}

function databases() {
  const from = account("a.sqlite", "WAL", MONEY);
  const to = account("b.sqlite", "DELETE", 0);
  for (let count = 1; ; count++) {
    from(-1, count);
    to(1, count);
    fs.writeSync(1, "\n");
    if (!hear()) return;
  }
}

function files() {
  for (let count = 1; hear(); count++) {
    fs.writeFileSync(at(folder, "m.json.new"), JSON.stringify({ moves: count, rest: "x".repeat(count % 5000) }));
    fs.renameSync(at(folder, "m.json.new"), at(folder, "m.json"));
    fs.appendFileSync(at(folder, "z.jsonl"), `{"moves":${count}}\n`);
    fs.writeSync(1, "\n");
  }
}

function check(directory) {
  const read = (name) => {
    const database = new DatabaseSync(at(directory, name));
    const sound = database.prepare("PRAGMA integrity_check").get().integrity_check;
    const { money, moves } = database.prepare("SELECT money, moves FROM account").get();
    database.close();
    if (sound !== "ok") throw new Error(`${name}: ${sound}`);
    return { money, moves };
  };
  try {
    const a = read("a.sqlite");
    const b = read("b.sqlite");
    const json = JSON.parse(fs.readFileSync(at(directory, "m.json"), "utf8")).moves;
    const lines = fs.readFileSync(at(directory, "z.jsonl"), "utf8").split("\n");
    if (lines.pop() !== "") throw new Error("the log ends in half a line");
    const log = JSON.parse(lines.at(-1)).moves;
    const counts = [a.moves, b.moves, json, log];
    if (lines.length !== log) throw new Error(`the log has ${lines.length} lines and counts ${log}`);
    if (counts.some((count, i) => i > 0 && count > counts[i - 1]) || a.moves - log > 1)
      throw new Error(`the counts are of different times: ${counts}`);
    if (a.money + b.money !== MONEY - (a.moves - b.moves)) throw new Error("money came or went");
    return { moves: a.moves, problem: null };
  } catch (error) {
    return { moves: null, problem: error.message };
  }
}

if (mode === "check") {
  for (const directory of [folder, uid, ...others].filter(Boolean)) console.log(JSON.stringify(check(directory)));
} else {
  if (process.getuid() === 0) {
    process.setgroups([]);
    process.setgid(Number(uid));
    process.setuid(Number(uid));
  }
  if (mode === "databases") databases();
  else files();
}
