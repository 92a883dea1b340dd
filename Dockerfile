# A Linux in which a class can be graded, for computers whose own system has no namespaces (macOS, Windows)
# or should have nothing installed. The chapter "Grading a class" of the book says how it is built and run.
FROM debian:bookworm-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends bubblewrap ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# pip reads this variable. The address of PyTorch's builds for CPUs makes the image some gigabytes smaller.
ARG PIP_EXTRA_INDEX_URL

COPY pyproject.toml constraints.txt README.md LICENSE /usr/src/dian/
COPY dianlib /usr/src/dian/dianlib
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --constraint /usr/src/dian/constraints.txt '/usr/src/dian[grading]' \
    && rm -r /usr/src/dian
ENV PATH=/opt/venv/bin:$PATH

# Not as root: root in a container may not make namespaces. Any other number can be given with --user, so
# that what is written belongs to whoever grades.
RUN useradd --create-home grader && chmod 1777 /home/grader
ENV HOME=/home/grader
USER grader

WORKDIR /course
CMD ["dianlib", "grade", "--help"]
