"""The equations of the page in LaTeX, each where it belongs, and the table of symbols."""

EQUATIONS = [  # (chapter or chapter.function, LaTeX, a word about it)
    (
        "compress",
        r"\mathbb{E}\,\|\hat x - x\|^2 \le \omega \|x\|^2, \quad \mathbb{E}\,\hat x = x",
        "the class U(omega) of unbiased compressors",
    ),
    (
        "compress",
        r"\mathbb{E}\,\|\hat x - x\|^2 \le (1 - \delta)\,\|x\|^2",
        "the class B(delta) of contractive compressors",
    ),
    (
        "compress.TopK",
        r"\|\hat x - x\|^2 \le \left(1 - \frac{k}{d}\right) \|x\|^2",
        "with equality when all magnitudes are equal",
    ),
    (
        "compress.RandK",
        r"\mathbb{E}\,\hat x = x, \quad \mathbb{E}\,\|\hat x - x\|^2 = "
        r"\left(\frac{d}{k} - 1\right) \|x\|^2",
        "scaled by d/k",
    ),
    (
        "compress.QSGD",
        r"u_j = s\,\frac{|x_j|}{\mathrm{scale}}, \quad p_j = u_j - \lfloor u_j \rfloor, \quad "
        r"\ell_j = \lfloor u_j \rfloor + \mathrm{Bernoulli}(p_j)",
        "random rounding to s levels",
    ),
    (
        "compress.QSGD",
        r"\mathbb{E}\,\|\hat x - x\|^2 = "
        r"\left(\frac{\mathrm{scale}}{s}\right)^2 \sum_j p_j (1 - p_j)",
        "its variance, for each bucket",
    ),
    (
        "compress.Sign",
        r"\|\hat x - x\|^2 = \|x\|^2 - \frac{\|x\|_1^2}{d}",
        "one bit a coordinate",
    ),
    (
        "compress.with_feedback",
        r"p_t = e_t + x_t, \quad e_{t+1} = p_t - C(p_t), \quad "
        r"\sum_{t<T} C(p_t) + e_T = \sum_{t<T} x_t",
        "what is left out is sent later; the sum telescopes",
    ),
    ("sam", r"\min_w \max_{\|e\| \le \rho} F(w + e)", "what SAM minimises"),
    (
        "sam.perturb",
        r"e = \rho\,\frac{u}{\|u\|}, \qquad w \leftarrow w - \eta\,\nabla F(w + e)",
        "Foret et al. 2021, equations (2) and (3); eta is lr",
    ),
    (
        "sam.hessian_vector",
        r"H v = \nabla \langle \nabla F, v \rangle",
        "a Hessian-vector product costs no more than a few gradients",
    ),
    (
        "sam.largest_eigenvalue",
        r"H q_j = \beta_{j-1} q_{j-1} + \alpha_j q_j + \beta_j q_{j+1}, \quad "
        r"\|H y - \theta y\| = \beta_{n-1}\,|s_{n-1}|",
        "Lanczos; theta and s belong to the largest eigenvalue of the tridiagonal T",
    ),
    (
        "synth",
        r"\theta_{j+1} = \theta_j - a\,\nabla \ell(\theta_j; X, Y), \qquad "
        r"L = \frac{\|\theta_M - w^{p+r}\|^2}{\|\theta_0 - w^{p+r}\|^2}, \quad \theta_0 = w^p",
        "trajectory matching: images on which descent takes the path of the federation",
    ),
    (
        "synth.soft_cross_entropy",
        r"\ell = -\frac{1}{n} \sum_{i=1}^{n} \sum_c \mathrm{softmax}(Y_i)_c "
        r"\log \mathrm{softmax}(z_i)_c",
        "z_i are the scores of image i",
    ),
    (
        "synth.unroll",
        r"\theta_{j+1} = \theta_j - a\,\nabla \ell(\theta_j; X, Y)",
        "differentiable with respect to X, Y and a",
    ),
    (
        "synth.matching_loss",
        r"L = \frac{\|\theta_M - \mathrm{target}\|^2}{\|\theta_0 - \mathrm{target}\|^2}",
        "1: no nearer to the target; 0: there",
    ),
    (
        "fl",
        r"\min_w F(w) = \frac{1}{N} \sum_{i=1}^{N} F_i(w), \qquad "
        r"w^{t+1} = w^t + \frac{\eta_s}{m} \sum_{i \in S_t} C\left(w_{i,K} - w^t\right)",
        "a round of FedAvg with a compressor C and m clients S_t; eta_s is server_lr",
    ),
    (
        "fl.SCAFFOLD",
        r"G = g + c - c_i, \qquad c_i' = c_i - c - \frac{w_{i,K} - w^t}{K \eta}",
        "control variates of a client",
    ),
    (
        "fl.SCAFFOLD",
        r"c \leftarrow c + \frac{1}{N} \sum_{i \in S_t} (c_i' - c_i)",
        "and of the server",
    ),
    (
        "fl.FedSAM",
        r"G = \nabla F_i\left(w + \rho\,\frac{\nabla F_i(w)}{\|\nabla F_i(w)\|}\right)",
        "the client's own gradient is the ascent direction",
    ),
    (
        "fl.FedLESAM",
        r"u = w_{\mathrm{old}} - w^t",
        "the way back to the model of this client's last round",
    ),
    (
        "fl.FedSynSAM",
        r"u = (1 - \mathrm{mix})\,\frac{g_i}{\|g_i\|} + \mathrm{mix}\,"
        r"\frac{g_{\mathrm{syn}}}{\|g_{\mathrm{syn}}\|}, \qquad "
        r"g_{\mathrm{syn}} = \nabla \ell(w; X, Y)",
        "the blend is this project's choice",
    ),
]

SYMBOLS = [  # (LaTeX, name in code, shape, meaning)
    ("d", "d", "number", "number of parameters of the network"),
    (r"w, w^t", "w", "[d]", "model during local steps; global model of round t"),
    (r"F_i, F", "task.loss", "number", "loss of client i; their mean, the global loss"),
    ("N, m, K", "N, m, K", "numbers", "clients; clients of a round; local steps"),
    (r"\eta, \eta_s", "lr, server_lr", "numbers", "step size of a client and of the server"),
    ("g, G", "g, G", "[d]", "gradient of a batch; corrected gradient, for the local step"),
    (r"u", "u", "[d]", "ascent direction of SAM"),
    (r"\rho", "rho", "number", "radius of the ascent step"),
    (r"x, \hat x", "x, x_hat", "[d]", "an update; what is decoded from its bytes"),
    ("C", "compressor", "", "encode and decode"),
    ("k, s", "k, levels", "numbers", "coordinates kept; levels of QSGD"),
    ("e_t", "e, residual", "[d]", "what error feedback still owes"),
    ("c, c_i", "c, c_i", "[d]", "control variates of SCAFFOLD"),
    ("H", "times", "[d] -> [d]", "Hessian of a loss, as a function v -> H v"),
    (r"X, Y, a", "images, logits, step", "[n, C, H, W], [n, classes], []", "synthetic data"),
    (r"\theta_j, M", "w, inner_steps", "[d], number", "model after j unrolled steps; their number"),
    ("L", "matching_loss", "number", "matching loss of a synthesis"),
]
