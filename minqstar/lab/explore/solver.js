// The token MDP of one post as a table, solved as minqstar/theory/mdp.py solves it: soft Bellman backward induction.
// Rewards, V and Q are in reward units, log-probabilities in nats, beta in reward units a nat. After EOS, V* = 0.
"use strict";

// What the world's knobs make of a table: log pi_ref and r of each arc. An arc's mass is linear in eps.
function tableOf(world, knobs) {
  const logRef = world.mass.map((arcs) => {
    const mass = arcs.map(([at0, at1]) => at0 + knobs.eps * (at1 - at0));
    const total = mass.reduce((sum, m) => sum + m, 0);
    return mass.map((m) => Math.log(m / total));
  });
  const reward = world.pays.map((arcs) => arcs.map((kind) => (kind ? knobs.paid[kind] : 0)));
  return { next: world.next, logRef, reward };
}

function logSumExp(values) {
  const most = Math.max(...values);
  if (most === -Infinity) return most;
  return most + Math.log(values.reduce((sum, v) => sum + Math.exp(v - most), 0));
}

// Eq. 7, 6, 5 from the last state to the first: every arc leads to a later state, or to the end, whose number is S.
function solve(table, beta) {
  const S = table.next.length;
  const V = new Float64Array(S + 1);
  const Q = [], logPi = [], advantage = [];
  for (let s = S - 1; s >= 0; s--) {
    Q[s] = table.next[s].map((to, a) => table.reward[s][a] + beta * table.logRef[s][a] + V[to]);
    V[s] = beta * logSumExp(Q[s].map((q) => q / beta));
    logPi[s] = Q[s].map((q) => (q - V[s]) / beta);
    advantage[s] = table.next[s].map((to, a) =>
      table.logRef[s][a] === -Infinity ? 0 : beta * (logPi[s][a] - table.logRef[s][a]),
    ); // Eq. 10: r + V*(s') - V*(s)
  }
  return { V, Q, logPi, advantage };
}

// The states and arcs that token ids pass, up to where they leave the grammar.
function walk(world, ids) {
  const states = [], arcs = [];
  let s = 0;
  for (const id of ids) {
    const arc = s < world.token.length ? world.token[s].indexOf(id) : -1;
    if (arc < 0) break;
    states.push(s);
    arcs.push(arc);
    s = world.next[s][arc];
  }
  return { states, arcs, end: s };
}

// Eq. 14: pi_ref (pi/pi_ref)^alpha over some tokens, with what is left of both for all others; log-probabilities, nats.
function mixed(logPi, logRef, alpha) {
  const rest = (logps) => Math.log(Math.max(1e-12, 1 - logps.reduce((sum, v) => sum + Math.exp(v), 0)));
  const pi = [...logPi, rest(logPi)], ref = [...logRef, rest(logRef)];
  const scores = pi.map((v, a) => ref[a] + alpha * (v - ref[a]));
  const total = logSumExp(scores);
  return scores.slice(0, -1).map((v) => v - total);
}
