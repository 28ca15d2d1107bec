// Reads all formats of each directory, and connects to itself by mutual TLS: the server with PEM, the client with PKCS#12.
"use strict";
const crypto = require("node:crypto");
const fs = require("node:fs");
const tls = require("node:tls");

const serial = (certificate) => certificate.serialNumber.toLowerCase().replace(/^0+/, "");

function check(directory) {
  const read = (name) => fs.readFileSync(`${directory}/${name}`);
  const leaf = new crypto.X509Certificate(read("tls.der"));
  const [, prefix] = /BEGIN (.*)PRIVATE KEY/.exec(read("tls.key").toString());
  const type = { "": "pkcs8", "RSA ": "pkcs1", "EC ": "sec1" }[prefix];
  const key = crypto.createPrivateKey({ key: read("tls.key.der"), format: "der", type });
  if (!leaf.checkPrivateKey(key)) throw new Error(`${directory}: key and certificate do not match`);
  const ca = read("ca.crt");
  const requirements = { ca, requestCert: true, rejectUnauthorized: true };
  const servers = [{ cert: read("tls.crt"), key: read("tls.key") }, { cert: read("tls.pem"), key: read("tls.pem") }];
  const pfx = { pfx: read("keystore.p12"), passphrase: read("keystore.password").toString() };
  return Promise.all(servers.map((options) => connect({ ...options, ...requirements }, { ...pfx, ca }))).then((seen) => {
    console.log(JSON.stringify({ directory, seen: [serial(leaf), ...seen.flat()] }));
  });
}

function connect(serverOptions, clientOptions) {
  return new Promise((resolve, reject) => {
    const seen = [];
    const server = tls.createServer(serverOptions, (socket) => {
      seen.push(serial(socket.getPeerCertificate()));
      socket.on("error", reject);
      socket.end("done");
    });
    server.on("tlsClientError", reject);
    server.listen(0, "127.0.0.1", () => {
      const options = { ...clientOptions, host: "127.0.0.1", port: server.address().port, servername: "localhost" };
      const client = tls.connect(options, () => seen.push(serial(client.getPeerCertificate())));
      client.on("error", reject);
      client.resume();
      client.on("close", () => server.close(() => resolve(seen)));
    });
  });
}

process.argv.slice(2).reduce((before, directory) => before.then(() => check(directory)), Promise.resolve());
