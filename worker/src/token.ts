/** Who may ask: the holder of the service token, in either header; one that is valid is enough. The supervisor's rule. */

/** The supervisor takes no other token, and without one nobody could be told from anybody. */
export const isUsable = (token: string | undefined): token is string => /^[!-~]{32,512}$/.test(token!);

export async function isAuthorized(headers: Headers, token: string): Promise<boolean> {
  const is = async (guess?: string | null) => crypto.subtle.timingSafeEqual(await digest(guess), await digest(token));
  // Both are always compared, and digests have one length, so the time of an answer tells nothing.
  const bearer = await is(headers.get("Authorization")?.match(/^bearer (.*)/i)?.[1]);
  return (await is(headers.get("X-OpenAgents-Service-Token"))) || bearer;
}

const digest = (text?: string | null) => crypto.subtle.digest("SHA-256", new TextEncoder().encode(text ?? ""));
