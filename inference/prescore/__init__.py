"""The pre-score: what a draft is expected to make of fixed responses of its target, without decoding any of them.

A response y_1..y_n that the target has written fixes what a draft sees at every anchor, because whatever stands in
speculative decoding is y itself. So one pass of the draft over the response gives its rows at all anchors and slots at
once, and with them the law of the number of target passes that decoding would take to write y:

- At temperature 0 decoding is deterministic. The draft's slot k stands if and only if its likeliest token is y's, and
  as long as all slots before it stood, its chain is y: the walk from an anchor to the one after the accepted tokens and
  the target's own gives the exact passes. A sibling stands where the first mismatch is among the ranks offered beside
  it; then the round writes the sibling and the token after it.
- Above 0, let y be drawn from the target's p and the draft's token x from its q. The chance that a slot writes y
  because x = y was accepted is q(y) min(1, p(y) / q(y)) = min(p(y), q(y)), and that it writes y at all is p(y): given
  y, the slot stands with chance

      min(1, q(y) / p(y)),

  whatever comes later. With S_m the product of these chances over the first m slots, a round at anchor a with blocks
  of l tokens accepts m < l tokens with chance S_m - S_{m+1} and all of them with chance S_l, and the expected passes
  left to write y are

      E[a] = 1 + sum_m P(m accepted at a) E[a + m + 1],    E[n] = 0.

  The same sums, run forward as the chance that an anchor is visited, give the rounds by length of their block. Averaged
  over y this is the expectation of decoding; with y fixed, the luck of accepting and drawing is gone. Siblings are left
  out: their chances depend on what else was drawn, so with siblings the figure is a lower bound.
- A draft that is certain of a token (look-up) has chance 1 where that is y's and 0 where it is not, at any temperature.

p and q are the distributions after temperature, top-k, top-p and penalties, as in `inference.sampling`. A block never
reaches beyond the request's budget less the target's own token; what lies behind the end of y counts for nothing.

Exact means up to rounding: rows of a pass over a whole response and of one over a few tokens differ in their last bits.

`rehearsal` holds the response, the table of chances and its walk; `rows` turns rows of logits into chances; `responses`
lets the target write; `costs` times a draft; `ranking` puts drafts in order. A draft takes part by a method `rehearse`
(`rehearsal.Rehearses`).
"""
