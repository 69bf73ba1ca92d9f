// Makes or changes the databases of a workspace (workspace.rs): TASKS is a list of { path, size, seed, change }.
// With `change` that many rows of an existing database are rewritten, else `size` bytes of rows are inserted.
const { DatabaseSync } = require("node:sqlite");

const WORDS = Array.from({ length: 600 }, (_, i) => (i * 7919 + 104729).toString(36));

for (const { path, size, seed, change } of JSON.parse(process.env.TASKS)) {
  let state = seed | 1;
  // xorshift32
  const below = (limit) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) % limit;
  };
  const text = () => {
    let words = "";
    while (words.length < 700) words += WORDS[Math.min(below(600), below(600))] + " ";
    return words;
  };
  const vector = () => Uint8Array.from({ length: 64 }, () => below(256));

  const database = new DatabaseSync(path);
  database.exec("PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF; BEGIN");
  if (change) {
    const count = database.prepare("SELECT count(*) AS count FROM messages").get().count;
    const update = database.prepare("UPDATE messages SET body = ? WHERE id = ?");
    for (let i = 0; i < change; i++) update.run(text(), 1 + below(count));
  } else {
    database.exec("CREATE TABLE messages (id INTEGER PRIMARY KEY, session TEXT, role TEXT, body TEXT, vector BLOB)");
    database.exec("CREATE INDEX by_session ON messages (session)");
    const insert = database.prepare("INSERT INTO messages (session, role, body, vector) VALUES (?, ?, ?, ?)");
    for (let written = 0; written < size; written += 840)
      insert.run(WORDS[below(200)], ["user", "assistant"][below(2)], text(), vector());
  }
  database.exec("COMMIT");
  database.close();
}
