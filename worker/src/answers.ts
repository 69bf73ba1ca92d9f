/** What the edge itself says: errors in the envelope of the API, and log lines. */
export const failure = (status: number, code: string, error: string, headers?: Record<string, string>): Response =>
  Response.json({ ok: false, error, code }, { status, headers: headers! });

export const log = (level: "info" | "warn", msg: string, fields?: object): void =>
  console.log(JSON.stringify({ ts: new Date(), level, msg, ...fields }));
