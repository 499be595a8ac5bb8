"""Question and pages -> an answer that cites its pages."""
