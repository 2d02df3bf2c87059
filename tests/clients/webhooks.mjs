// npm's standardwebhooks: it signs as a sender, and checks as a receiver.

import { Webhook } from "standardwebhooks";

export function signWebhook({ secret, message, seconds, body }) {
  return new Webhook(secret).sign(message, new Date(seconds * 1000), body);
}

export function verifyWebhook({ secret, body, headers }) {
  try {
    return { event: new Webhook(secret).verify(body, headers) };
  } catch (error) {
    return { refused: error.message };
  }
}
