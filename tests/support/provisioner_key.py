"""A provisioner's key that Smallstep's library (go.step.sm/crypto 0.77.1) created and encrypted, like `step crypto jwk create`."""

from __future__ import annotations

PASSWORD = "correct horse"
JWK = {
    "use": "sig",
    "kty": "EC",
    "kid": "NLqvuueGeWwdlmsJ-7Vwv8kswM_a5pf--wFJIwc_73w",
    "crv": "P-256",
    "alg": "ES256",
    "x": "1T1bG6-4N1BmbUI-bpzpxN5ZPIl__N_5RfT3MfSaNFs",
    "y": "meMeDa6YRG57BbcTxlGP2bhglfGlrH0HnuOSAAr5j1I",
    "d": "rc20pSOs4ay0gS35yFU4Az2CmMH_vj7dJ11z_U3K2_Q",
}
JWE = (
    "eyJhbGciOiJQQkVTMi1IUzI1NitBMTI4S1ciLCJjdHkiOiJqd2sranNvbiIsImVuYyI6IkEyNTZHQ00iLCJwMmMiOjYwMDAwMCwicDJzIjoiMGxvQjRNR25jc"
    "WJFZjNjUWdVbkQ0ZyJ9.vIyh2jXrsP4ZlKqLQuTluKnv1IVnVNt3PxrSP8_q_X_57aYe2RYYnw.2ar5tlPiXbCPrtlG.Q6jBTqYDWs1wQRvi82AOoSKkg0sHp"
    "N-7JvUa86H7smFczpxc3MQvRJ_DykxZUJbfh0KPNQuc50ZHOCx74PiyekJQIZD1kKXMp5z_DoDJL1LNmq7qXxysY1YkWsm4Sug_r7xx7wSDnhgvXoF5eS4IcY"
    "kbbKRsAgeSP2n7ebTMZsmqhxsjZ7XAbbmyme0xCdpUY0HbIhx86EBbDW8LlZoAJVmDkuPGwhDOp5pKqmJLG8Gy7R9fwHeITWlwGk3WfN0fQYM_q2eklFitBIf"
    "g_oJfOrn3fm4cxWuGl70heuJ96P5e26MIR3i_c6tJMzi20h8dnf_qEQBbgcAhhOJTk-U.cYCZOqZs2waZbFFiossUvg"
)
