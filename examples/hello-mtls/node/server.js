const { constants } = require("node:crypto");
const fs = require("node:fs");
const https = require("node:https");

const newest = () => {
  const pem = fs.readFileSync("/var/run/tls/site.pem");
  // Without tickets: when a session is resumed, Node.js does not verify the client's certificate again.
  const secureOptions = constants.SSL_OP_NO_TICKET;
  return { cert: pem, key: pem, ca: fs.readFileSync("/var/run/tls/root.crt"), secureOptions };
};
const server = https.createServer({ ...newest(), requestCert: true }, (request, response) => {
  const identity = request.socket.getPeerCertificate().subjectaltname?.match(/spiffe:[^,]+/)?.[0];
  response.statusCode = identity ? 200 : 403;
  response.end(identity ? `hello ${identity}\n` : "no SPIFFE ID\n");
});
server.listen(8443);
fs.watch("/var/run/tls", (_event, name) => {
  if (name === "..data") server.setSecureContext(newest());
});
